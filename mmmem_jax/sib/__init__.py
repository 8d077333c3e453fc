"""SIB-GRPO: rollouts, the reward of eq. 10, advantages, the clipped loss, the SIB bounds."""
