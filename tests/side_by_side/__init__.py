"""The program's reading and statistics beside those of LeRobot itself: `make test-lerobot`."""
