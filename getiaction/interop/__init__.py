"""Open doors: LeRobot's policy folders, out and in."""
