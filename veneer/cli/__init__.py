"""The command line: `veneer …`. Nothing here imports torch before the mistakes that are visible without it are told."""
