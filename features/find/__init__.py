"""Finding what each latent fires on: firings sorted by latent, described, written as Parquet and read again."""
