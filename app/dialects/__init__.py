"""Vendors' contracts, one file each: their routes, their words for our jobs, their shape of a refusal."""
