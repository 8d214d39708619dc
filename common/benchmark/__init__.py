"""What a training step costs, side by side with the obvious alternative (`python -m common.benchmark`)."""
