"""The GPU executor: one Triton kernel that walks a BlockPlan, whatever pattern made it."""
