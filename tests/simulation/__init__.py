"""A fleet of 1 to 1,000 GPUs on paper: the worker's own rules decide, on a clock of their own."""
