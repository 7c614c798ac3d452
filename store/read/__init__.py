"""Reading a store: shuffled batches, rows by number or token, several stores as one."""
