"""The machine: its device, its processes, and what fits into its memory."""
