"""Read the first GetiAction's YAML files (`model`, `data`, `trainer`), and say them as overrides of the config here."""
