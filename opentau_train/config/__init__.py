"""Every setting of a run: typed, bounded, explained, and compared when a run is resumed."""
