"""One trial: its training, what it writes to the database, its checkpoint."""
