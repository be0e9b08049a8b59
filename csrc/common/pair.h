// Two neighbouring channels.
#pragma once

namespace stitchvm {

template <class A>
struct Pair {
  A first;
  A second;
};

}  // namespace stitchvm
