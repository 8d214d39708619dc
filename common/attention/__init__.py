"""How far, and in which direction, the heads of a trained Transformer look (paper, appendix B)."""
