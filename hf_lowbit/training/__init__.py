"""What training in low precision needs: optimizers, straight-through functions, losses."""
