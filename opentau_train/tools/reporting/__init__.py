"""What `tools.report` shows: runs as they are read from their directories, and the parts of the page."""
