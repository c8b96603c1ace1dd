"""What a validation reads, measures and shows."""
