"""Simulators, rollouts, metrics, videos and scripted experts. Knows no policy: a rollout takes a callable."""
