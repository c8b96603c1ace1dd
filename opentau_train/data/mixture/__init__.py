"""From settings to an opened mixture: what is read, held out, normalised, and in which shares."""
