"""Guidance: functions from scores to a score, for every sampler and every process."""
