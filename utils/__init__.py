"""What two or more of the other folders share: each file named after what it does."""
