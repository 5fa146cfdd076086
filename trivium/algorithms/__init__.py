"""SFT, reward modeling, PPO, DPO and GRPO: one file each, beside its configuration."""
