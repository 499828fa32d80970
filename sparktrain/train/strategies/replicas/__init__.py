"""How ranks that hold replicas of the parameters stay together: what strategies have in common."""
