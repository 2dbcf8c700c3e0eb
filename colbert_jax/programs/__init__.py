"""What the programs in `launch/` that use a trained model do, one file each."""
