"""From a LeRobotDataset v3.0 to batches: read once, decode once, gather on the device."""
