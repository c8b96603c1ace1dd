"""What `tools.inspect` shows of a mixture: rows, clips, findings, what the policy sees; and the page of it."""
