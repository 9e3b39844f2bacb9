"""Thin adapters to other libraries, one file a host; nothing here is imported by `import fdiv`."""
