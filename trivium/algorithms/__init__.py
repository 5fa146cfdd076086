"""SFT, reward modelling, PPO, DPO and GRPO: one file each, beside its configuration."""
