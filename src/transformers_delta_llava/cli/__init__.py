"""The `delta-llava` command."""
