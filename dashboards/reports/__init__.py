"""A study's report: on the console, as one HTML page, as JSON, as CSV."""
