"""Frames of a clip, by a loop over its moments and the frames of the video."""


def frames_by_number(count, length, step, start):
    """Return every ``step``-th frame of a video of ``count``, from one of the places that leave room."""
    places = count - (length - 1) * step
    first = 0 if places < 1 else int(start * places)
    return [min(first + step * k, count - 1) for k in range(length)]


def frames_by_clock(times, length, fps, start):
    """Return the frame that is on show at each of ``length`` moments, ``1 / fps`` seconds apart."""
    last_shown = (times[-1] - times[0]) / (len(times) - 1)
    room = times[-1] - times[0] + last_shown - (length - 1) / fps
    found = []
    for k in range(length):
        moment = times[0] + start * max(room, 0) + k / fps
        shown = 0
        for number, time in enumerate(times):
            if time <= moment + 1e-9:
                shown = number
        found.append(shown)
    return found
