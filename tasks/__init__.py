"""Prefect tasks: thin, cached, retryable; each runs one job of fvlm_core and returns what it made."""
