"""One worker process: claim a trial, run it, repeat."""
