"""What `tools.check` says of a composed configuration, before a job is queued: a module a thing that it looks at."""
