"""What a run saves and how it is saved: whole or absent, on any number of ranks."""
