"""The fifty tasks in words: an instruction, other wordings of it, and the scene that the camera sees.

Tasks of one scene show the same objects, and so only the instruction tells them apart: the ones that
a reward model confuses if it looks at the picture alone.
"""

from __future__ import annotations

from rbm.trajectory import Task

TASKS: dict[str, Task] = {
    name: Task(text, scene, tuple(paraphrases))
    for name, (scene, text, *paraphrases) in {
        "assembly": (
            "peg ring", "put the ring onto the peg",
            "place the wrench's ring over the peg", "pick up the ring and slide it onto the peg",
            "assemble the ring and the peg",
        ),
        "disassemble": (
            "peg ring", "take the ring off the peg",
            "lift the ring off the peg", "pull the ring up and away from the peg", "remove the ring from the peg",
        ),
        "basketball": (
            "basketball hoop", "put the ball into the basket",
            "dunk the basketball", "pick up the ball and drop it through the hoop", "get the ball into the hoop",
        ),
        "bin-picking": (
            "two bins", "move the cube from one bin to the other",
            "pick up the cube and put it in the other bin", "transfer the block to the empty bin",
            "take the cube out of its bin and drop it into the second one",
        ),
        "box-close": (
            "box", "put the lid on the box",
            "close the box with its lid", "cover the box", "pick up the lid and place it on the box",
        ),
        "button-press-topdown": (
            "button up", "press the button from above",
            "push the button down", "press down on the red button", "hit the button on top of the box",
        ),
        "button-press-topdown-wall": (
            "button up wall", "press the button from above behind the wall",
            "push the button down past the wall", "reach over the wall and press the button down",
            "press down on the button beside the wall",
        ),
        "button-press": (
            "button front", "press the button from the front",
            "push the button in", "press the red button into the box", "push in the button facing the robot",
        ),
        "button-press-wall": (
            "button front wall", "press the button on the other side of the wall",
            "push the button in past the wall", "get around the wall and press the button",
            "go over the wall and push the button in",
        ),
        "coffee-button": (
            "coffee machine", "press the button of the coffee machine",
            "start the coffee machine", "push the coffee machine's button", "turn on the coffee maker",
        ),
        "coffee-pull": (
            "coffee machine mug", "pull the mug away from the coffee machine",
            "take the mug from under the coffee machine", "drag the cup away from the coffee maker",
            "move the coffee mug out to the goal",
        ),
        "coffee-push": (
            "coffee machine mug", "push the mug under the coffee machine",
            "move the cup to the coffee machine", "put the mug below the coffee maker",
            "slide the coffee mug into the machine",
        ),
        "dial-turn": (
            "dial", "turn the dial",
            "rotate the dial", "twist the knob around", "give the dial half a turn",
        ),
        "door-close": (
            "door", "close the door",
            "shut the door", "push the door closed", "swing the safe's door shut",
        ),
        "door-open": (
            "door", "open the door",
            "pull the door open", "swing the door open by its handle", "open up the safe's door",
        ),
        "door-lock": (
            "door lock", "lock the door",
            "turn the lock to close it", "rotate the latch down to lock the door", "bolt the door",
        ),
        "door-unlock": (
            "door lock", "unlock the door",
            "turn the lock to open it", "rotate the latch to release the door", "unbolt the door",
        ),
        "drawer-close": (
            "drawer", "close the drawer",
            "shut the drawer", "push the drawer in", "slide the drawer closed",
        ),
        "drawer-open": (
            "drawer", "open the drawer",
            "pull the drawer out", "slide the drawer open", "pull open the drawer by its handle",
        ),
        "faucet-close": (
            "faucet", "close the faucet",
            "turn the faucet off", "rotate the tap's handle to shut it", "shut off the water tap",
        ),
        "faucet-open": (
            "faucet", "open the faucet",
            "turn the faucet on", "rotate the tap's handle to open it", "turn on the water tap",
        ),
        "hammer": (
            "hammer nail", "hammer the nail into the wall",
            "hit the nail with the hammer", "pick up the hammer and drive the nail in", "knock the nail in",
        ),
        "hand-insert": (
            "hole", "put the block into the hole with the hand",
            "insert the gripper with the block into the hole", "lower the hand and the block into the hole",
            "bring the block down into the opening of the table",
        ),
        "handle-press-side": (
            "handle side", "press the handle down from the side",
            "push the handle at the side downwards", "lower the sideways handle", "press down the side handle",
        ),
        "handle-pull-side": (
            "handle side", "pull the handle up from the side",
            "lift the handle at the side", "raise the sideways handle", "pull up the side handle",
        ),
        "handle-press": (
            "handle", "press the handle down",
            "push the handle downwards", "lower the handle", "press down on the lever's handle",
        ),
        "handle-pull": (
            "handle", "pull the handle up",
            "lift the handle", "raise the handle", "pull the handle upwards",
        ),
        "lever-pull": (
            "lever", "pull the lever up",
            "lift the lever", "raise the lever until it stands upright", "swing the lever upwards",
        ),
        "peg-insert-side": (
            "peg hole", "insert the peg into the hole in the side",
            "push the peg into the side of the box", "put the peg sideways into the hole",
            "pick up the peg and stick it into the hole",
        ),
        "peg-unplug-side": (
            "peg plug", "pull the peg out of the box",
            "unplug the peg sideways", "remove the peg from its hole", "draw the plug out of the side",
        ),
        "pick-out-of-hole": (
            "puck hole", "take the puck out of the hole",
            "pick the puck up from the hole", "lift the puck out of the hole to the goal",
            "get the puck out of the pit",
        ),
        "pick-place": (
            "puck", "pick up the puck and hold it at the goal",
            "lift the puck to the goal", "grasp the puck and bring it to the floating target",
            "pick the puck up and place it at the marker",
        ),
        "push": (
            "puck", "push the puck to the goal",
            "slide the puck to the target", "move the puck over the table to the marker",
            "push the red puck onto the green dot",
        ),
        "reach": (
            "puck", "reach the goal with the gripper",
            "move the hand to the target", "bring the gripper to the marker", "touch the goal with the hand",
        ),
        "pick-place-wall": (
            "puck wall", "lift the puck over the wall to the goal",
            "pick up the puck and carry it over the wall", "bring the puck past the wall to the floating target",
            "carry the puck above the wall to the marker",
        ),
        "push-wall": (
            "puck wall", "push the puck around the wall to the goal",
            "slide the puck past the wall to the target", "move the puck around the wall to the marker",
            "push the puck behind the wall onto the goal",
        ),
        "reach-wall": (
            "puck wall", "reach the goal behind the wall with the gripper",
            "move the hand over the wall to the target", "bring the gripper past the wall to the marker",
            "touch the goal beyond the wall with the hand",
        ),
        "plate-slide": (
            "plate cabinet", "slide the plate into the cabinet",
            "push the plate into the goal", "move the disc forward into the shelf", "slide the puck plate in",
        ),
        "plate-slide-back": (
            "plate cabinet", "slide the plate back out of the cabinet",
            "pull the plate out towards the robot", "drag the disc back out of the shelf", "slide the puck plate out",
        ),
        "plate-slide-side": (
            "plate cabinet side", "slide the plate sideways into the cabinet",
            "push the plate to the side into the goal", "move the disc sideways into the shelf",
            "slide the puck plate in from the side",
        ),
        "plate-slide-back-side": (
            "plate cabinet side", "slide the plate sideways out of the cabinet",
            "pull the plate out to the side", "drag the disc sideways out of the shelf",
            "slide the puck plate out to the side",
        ),
        "push-back": (
            "block", "push the block back to the goal",
            "pull the block towards the robot onto the target", "drag the block back to the marker",
            "move the block backwards to the goal",
        ),
        "shelf-place": (
            "shelf", "put the block on the shelf",
            "place the cube on the shelf", "pick up the block and set it on the shelf", "lift the block onto the shelf",
        ),
        "soccer": (
            "soccer goal", "push the ball into the goal",
            "score a goal with the soccer ball", "roll the ball into the net", "shoot the ball into the soccer goal",
        ),
        "stick-pull": (
            "stick thermos", "pull the thermos with the stick",
            "hook the thermos with the stick and pull it to the goal", "grasp the stick and drag the bottle with it",
            "use the stick to pull the bottle",
        ),
        "stick-push": (
            "stick thermos", "push the thermos with the stick",
            "pick up the stick and push the bottle to the goal", "use the stick to push the bottle",
            "shove the thermos to the goal with the stick",
        ),
        "sweep": (
            "sweep block", "sweep the block off the table",
            "push the cube off the edge of the table", "sweep the cube to the goal at the side",
            "shove the block over the table's edge",
        ),
        "sweep-into": (
            "sweep hole", "sweep the block into the hole",
            "push the cube into the hole", "sweep the cube so that it falls into the hole",
            "shove the block into the opening in the table",
        ),
        "window-close": (
            "window", "close the window",
            "slide the window shut", "push the window closed", "shut the sliding window",
        ),
        "window-open": (
            "window", "open the window",
            "slide the window open", "push the window to the side to open it", "open up the sliding window",
        ),
    }.items()
}  # fmt: skip
"""Environment name, without Meta-World's version ending, to its task."""

MT10 = (
    "reach", "push", "pick-place", "door-open", "drawer-open",
    "drawer-close", "button-press-topdown", "peg-insert-side", "window-open", "window-close",
)  # fmt: skip
"""Meta-World's own choice of ten."""
