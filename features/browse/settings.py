"""What `gsae browse --blind` draws. The options of the command are made from it, so it imports nothing heavy."""

from gsae.settings import Settings, setting


class BlindSettings(Settings):
    """Which latents of two SAEs are drawn for a blind comparison."""

    pairs: int = setting(50, "Latents of each SAE to rate.", panel="With --blind", metavar="LATENTS", ge=1)
    seed: int = setting(
        0, "Seed of the latents that are drawn, and of their order.", panel="With --blind", metavar="SEED"
    )
    minimum_rows: int = setting(
        20, "Latents that fire on fewer rows are not drawn.", panel="With --blind", metavar="ROWS", ge=1
    )
