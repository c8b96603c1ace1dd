"""What `tools.curate` is made of: losses by episode, sketched gradients, and what both say of the data."""
