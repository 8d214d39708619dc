"""The tables and figures of the paper: as data, as commands, as runs, as a report."""
