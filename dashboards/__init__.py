"""Reads studies and shows them; never trains."""
