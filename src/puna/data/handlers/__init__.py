"""Dataset handlers: one record per dataset format, in `registry.py`; each family of formats is one file."""
