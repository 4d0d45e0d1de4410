"""The only room that knows Hydra and OmegaConf: schema, cross-field checks, and what each config builds."""
