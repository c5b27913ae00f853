"""Names that diffusers gives to layers of denoisers which methods treat apart: regular expressions of whole names."""

EMBEDDERS = r".*(embed|adaln_single|caption_projection|conv_in).*"
"""What embeds patches, timesteps, classes and captions."""

OUTPUT = r"(conv_out|norm_out|proj_out).*"
"""What makes the model's output of the last block's."""

MODULATION = r".*\bnorm\w*\.linear\w*|.*time_emb_proj"
"""What reads the timestep's embedding within a block."""
