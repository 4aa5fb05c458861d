"""One Meta-World environment, stepped without pixels and rendered afterwards from stored physics.

Stepping runs at thousands of steps a second and rendering at about a hundred frames, so an attempt is
first rolled out on state alone, labelled, and only then are its few stored frames rendered. Two things
that are easy to get wrong:

- The environment hides the goal unless the task is set with `partially_observable=False` through
  `set_task`: setting the attribute alone leaves a cached observation space that clips the goal to 0,
  and experts that steer by the goal (door-close) push at the wrong place.
- Cameras `corner*` of Meta-World hang upside down. A camera whose up axis points down is turned by 180
  degrees; nothing is listed by name.
"""

from __future__ import annotations

import difflib
import os
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rbm.errors import UserError

SETTLE_STEPS = 30
"""Null actions after a reset, before the attempt begins: in some tasks objects start in the air."""

FPS = 80.0
"""Control steps a second: 5 physics steps of 2.5 ms each (`render_fps` of the environments)."""

NEAR_VIEW = "near"
"""Our own camera: close to the middle of the table, from the robot's right, above the arm.

In Meta-World's own views the objects are a few pixels wide at 96 px, or hidden by the arm."""

_NEAR = {"azimuth": 140.0, "elevation": -35.0, "distance": 1.1, "lookat": (0.0, 0.68, 0.12)}
_INFO = ("in_place_reward", "obj_to_target", "grasp_reward", "near_object")


def load_metaworld() -> Any:
    """The `metaworld` package.

    Raises:
        UserError: it is not installed, or can not render here.
    """
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # headless; the quiet one of MuJoCo's back ends
    # said by some scripted experts at every action, and of no use
    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", category=UserWarning)
    try:
        import metaworld
        import metaworld.policies
    except ModuleNotFoundError as error:
        raise UserError(
            f"collecting from Meta-World needs its simulator ({error}): run `make sim`, or pip install 'robot-rbm[sim]'"
        ) from error
    except (ImportError, AttributeError, RuntimeError) as error:  # the second where PyOpenGL finds no library
        raise _blind(error) from error
    return metaworld


def _blind(error: Exception) -> UserError:
    how = f"MUJOCO_GL={os.environ['MUJOCO_GL']}"
    return UserError(
        f"MuJoCo can not render with {how} ({type(error).__name__}): on Debian or Ubuntu, apt-get install libosmesa6 "
        "libegl1 libgl1, and leave MUJOCO_GL unset, or set it to egl where there is a GPU"
    )


@dataclass(frozen=True)
class Snapshot:
    """What the simulator says of one moment.

    Attributes:
        obs: float64 (39,): hand (3), gripper opening, object poses, the same a step before, goal (3).
        target: float64 (3,), where the object has to go.
        reward: the environment's dense reward of this state, 0 to 10.
        in_place, distance: `in_place_reward` and `obj_to_target` of `info`.
        success: the simulator's own signal.
        physics: MuJoCo's full state, enough to render this moment again.
    """

    obs: NDArray[np.float64]
    target: NDArray[np.float64]
    reward: float
    in_place: float
    distance: float
    success: bool
    physics: NDArray[np.float64]

    @property
    def hand(self) -> NDArray[np.float64]:
        return self.obs[:3]


class Simulator:
    """One environment; `reset(seed)` gives the same scene for the same seed whatever came before.

    Raises:
        UserError: no such environment, no such camera, or no simulator installed.
    """

    def __init__(self, name: str) -> None:
        load_metaworld()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
        from metaworld.types import Task

        key = f"{name}-v3"
        if key not in ALL_V3_ENVIRONMENTS:
            known = [other.removesuffix("-v3") for other in ALL_V3_ENVIRONMENTS]
            raise UserError(f"unknown Meta-World environment {name!r}: {did_you_mean(name, known)}")
        self.name = name
        env_class = ALL_V3_ENVIRONMENTS[key]
        self._env = env_class()
        task = {"env_cls": env_class, "rand_vec": None, "partially_observable": False}
        self._env.set_task(Task(env_name=key, data=pickle.dumps(task)))
        # set_task freezes the scene at `rand_vec`; here every reset draws its own from the seeded generator
        self._env._freeze_rand_vec = False
        self._env.seeded_rand_vec = True
        self._expert_class: Any = ENV_POLICY_MAP[key]
        self._renderers: dict[int, Any] = {}

    def expert(self) -> Any:
        """A fresh scripted expert; `get_action(obs)` may write into the observation: hand it a copy."""
        return self._expert_class()

    def reset(self, seed: int) -> Snapshot:
        """A new scene, settled."""
        self._env.seed(seed)
        self._env.reset()
        snapshot = self.step(np.array([0.0, 0.0, 0.0, -1.0], np.float32))
        for _ in range(SETTLE_STEPS - 1):
            snapshot = self.step(np.array([0.0, 0.0, 0.0, -1.0], np.float32))
        return snapshot

    def step(self, action: NDArray[np.float32]) -> Snapshot:
        """One control step: action float32 (4,), hand velocity (3) and gripper effort, in [-1, 1]."""
        obs, reward, _, _, info = self._env.step(action)
        return Snapshot(
            obs=obs,
            target=np.array(self._env._target_pos, np.float64),
            reward=float(reward),
            in_place=float(info["in_place_reward"]),
            distance=float(info["obj_to_target"]),
            success=bool(info["success"]),
            physics=self._physics(),
        )

    def go_back(self, moment: Snapshot) -> None:
        """Make `moment`, of the present scene, the present again; what follows is what followed then."""
        import mujoco

        mujoco.mj_setState(self._env.model, self._env.data, moment.physics, self._signature)
        mujoco.mj_forward(self._env.model, self._env.data)
        self._env._prev_obs = moment.obs[:18].copy()
        self._env._last_stable_obs = moment.obs.copy()
        self._env.curr_path_length = 0  # the environment refuses to step after 500 steps

    @cached_property
    def _signature(self) -> int:
        import mujoco

        return int(mujoco.mjtState.mjSTATE_INTEGRATION)

    def _physics(self) -> NDArray[np.float64]:
        import mujoco

        state = np.empty(mujoco.mj_stateSize(self._env.model, self._signature))
        mujoco.mj_getState(self._env.model, self._env.data, state, self._signature)
        return state

    def camera_names(self) -> list[str]:
        model = self._env.model
        return [NEAR_VIEW, *(model.camera(i).name for i in range(model.ncam))]

    def render(
        self, physics: Iterable[NDArray[np.float64]], cameras: tuple[str, ...], size: int
    ) -> dict[str, NDArray[np.uint8]]:
        """Frames of stored moments of the present scene: for each camera uint8 (T, size, size, 3), upright.

        The scene's fixtures are not part of `physics`: call this before the next `reset`. It leaves the
        simulator at the last moment rendered.

        Raises:
            UserError: no such camera, or the machine can not render.
        """
        import mujoco

        model, data = self._env.model, self._env.data
        known = self.camera_names()
        for camera in cameras:
            if camera not in known:
                raise UserError(f"unknown camera {camera!r} of Meta-World: {did_you_mean(camera, known)}")
        if size not in self._renderers:
            # multisampling, shadows and reflections cost nine tenths of the time of software rendering
            model.vis.quality.offsamples = 0
            model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
            model.vis.global_.offheight = max(model.vis.global_.offheight, size)
            try:
                self._renderers[size] = mujoco.Renderer(model, size, size)
            except Exception as error:  # each back end has its own
                raise _blind(error) from error
        renderer = self._renderers[size]
        clips: dict[str, list[NDArray[np.uint8]]] = {camera: [] for camera in cameras}
        for state in physics:
            mujoco.mj_setState(model, data, state, self._signature)
            mujoco.mj_forward(model, data)
            for camera in cameras:
                renderer.update_scene(data, camera=_near_camera() if camera == NEAR_VIEW else camera)
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
                frame = renderer.render()
                if camera != NEAR_VIEW and data.camera(camera).xmat[7] < -0.1:
                    frame = frame[::-1, ::-1]
                clips[camera].append(frame)
        return {camera: np.ascontiguousarray(np.stack(frames)) for camera, frames in clips.items()}

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._env.close()


def _near_camera() -> Any:
    import mujoco

    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.azimuth, camera.elevation, camera.distance = _NEAR["azimuth"], _NEAR["elevation"], _NEAR["distance"]
    camera.lookat[:] = _NEAR["lookat"]
    return camera


def did_you_mean(name: str, known: list[str]) -> str:
    """The close names, or all of them where none is close."""
    close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(sorted(known))}"
