"""Where numbers go: JSONL always, then consoles and trackers as configured."""
