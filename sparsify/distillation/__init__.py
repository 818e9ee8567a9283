"""The recovery's loss, from hidden states, without a batch's logits."""
