"""Data sets as uint8 arrays: where they come from, how they are split, where they lie."""
