"""Which window comes when: a pure function of the sample number."""
