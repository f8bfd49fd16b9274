"""Starting and watching workers, on this machine or on a Ray cluster."""
