"""What a store on disk consists of: the plan, the order of rows, arrays and their metadata, moments, the manifest."""
