"""What every study stands on. Imports no study."""
