// Winograd's convolution of one node: which tiles are transformed and multiplied together, by which thread.
#include "run.h"

namespace ternary {
namespace {

// The products of one position stand together for all tiles of a group, so that one reading of the weights serves them all.
struct Group {
  int count;  // tiles
  Output to;  // where their outputs go
};

class Convolution {
 public:
  explicit Convolution(const Task& task) : t_(task), side_(task.step.winograd_side), outputs_(winograd_outputs(side_)),
                                           tile_bytes_(task.in.cs * winograd_element_bytes(side_)),
                                           threads_(task.worker.member.team_size()), vectors_((task.node.n + task.isa.lanes - 1) / task.isa.lanes) {
    across_ = (t_.out.w + outputs_ - 1) / outputs_, per_image_ = across_ * ((t_.out.h + outputs_ - 1) / outputs_);
    tiles_ = (int64_t)per_image_ * t_.in.n;
    const int at_a_time = t_.isa.tiles[side_ - 4];
    const int64_t fewest = (tiles_ + at_a_time - 1) / at_a_time;
    by_tiles_ = fewest >= threads_;
    // As even as can be, and where they are few, as many for each thread.
    groups_ = by_tiles_ && fewest < 8 * threads_ ? std::min((fewest + threads_ - 1) / threads_ * threads_, tiles_) : fewest;
    largest_ = (tiles_ + groups_ - 1) / groups_;
    positions_bytes_ = side_ * side_ * largest_ * tile_bytes_, bytes_ = positions_bytes_ + largest_ * 4 * (int64_t)sizeof(int32_t);
  }
  void run() const { by_tiles_ ? by_tiles() : by_channels(); }

 private:
  // A thread transforms a few groups and uses them at once for all channels, from its cache.
  void by_tiles() const {
    constexpr int kMost = 8, kCached = 448 << 10;  // groups, and bytes of them
    const int64_t most = std::min<int64_t>(kMost, kCached / bytes_), each = groups_ / threads_;
    const int64_t chunk = std::max<int64_t>(1, std::min(most, threads_ > 1 && each >= 8 ? each / 8 : each));
    t_.worker.member.share((groups_ + chunk - 1) / chunk, [&](int64_t item) {
      uint8_t* const v = t_.worker.room(chunk * bytes_);
      Group groups[kMost];
      const int64_t first = item * chunk;
      const int count = (int)std::min(chunk, groups_ - first);
      for (int g = 0; g < count; ++g) {
        transform(first + g, 0, count_of(first + g), v + g * bytes_);
        set(first + g, groups[g]);
      }
      for (int vector = 0; vector < vectors_; ++vector)
        for (int g = 0; g < count; ++g) multiply(groups[g], vector, v + g * bytes_);
    });
  }

  // Where there are too few tiles for that, the threads share the transform and split channels.
  void by_channels() const {
    const int tiles_an_item = std::max(1, 256 / t_.in.cs);
    const int items_a_group = ((int)largest_ + tiles_an_item - 1) / tiles_an_item;
    t_.worker.member.share(groups_ * items_a_group, [&](int64_t item) {
      const int64_t group = item / items_a_group;
      const int from = item % items_a_group * tiles_an_item, end = std::min(count_of(group), from + tiles_an_item);
      transform(group, from, end, t_.shared + group * bytes_);
    });
    // Neighbouring channels go to one thread, which fetches the next one's weights while it computes.
    constexpr int kMost = 8;  // vectors, and groups
    const int64_t run = std::max<int64_t>(1, std::min<int64_t>(kMost, vectors_ / (4 * threads_)));
    const int64_t per_item = team_chunk(groups_, vectors_ / run, threads_, kMost), items = (groups_ + per_item - 1) / per_item;
    t_.worker.member.share(items * ((vectors_ + run - 1) / run), [&](int64_t item) {
      Group groups[kMost];
      const int64_t first = item % items * per_item, first_vector = item / items * run;
      const int count = (int)std::min(per_item, groups_ - first);
      for (int g = 0; g < count; ++g) set(first + g, groups[g]);
      for (int64_t vector = first_vector; vector < std::min<int64_t>(vectors_, first_vector + run); ++vector)
        for (int g = 0; g < count; ++g) multiply(groups[g], (int)vector, t_.shared + (first + g) * bytes_);
    });
  }

  int64_t first_of(int64_t group) const { return group * tiles_ / groups_; }
  int count_of(int64_t group) const { return (int)(first_of(group + 1) - first_of(group)); }

  // A group's tiles from ... end: transformed to v, where the whole group's input lies as [position][tile][channel], and the
  // starts of its accumulators after it.
  void transform(int64_t group, int from, int end, uint8_t* v) const {
    const int *stride = t_.node.stride, *padding = t_.node.padding;
    const int64_t tile = first_of(group) + from, position_stride = (int64_t)count_of(group) * tile_bytes_;
    int64_t image = tile / per_image_;
    int y = tile % per_image_ / across_, x = tile % across_;
    for (int t = from; t < end; ++t) {
      const uint8_t* patch = t_.in.element(image, t_.in.at(y * outputs_ * stride[0] - padding[0], x * outputs_ * stride[0] - padding[1]));
      int32_t* const start = (int32_t*)(v + positions_bytes_) + t * 4;
      t_.isa.winograd_input(side_, patch, t_.in.row(), t_.in.cs, t_.in.cs, v + (int64_t)t * tile_bytes_, position_stride, start);
      if (++x == across_) x = 0, ++y;
      if (y * across_ == per_image_) y = 0, ++image;
    }
  }

  void set(int64_t index, Group& group) const {
    const Value& out = t_.out;
    group.count = count_of(index);
    set_residual(group.to, t_.residual);
    const auto square = [&](const Value& v, int64_t image, int y, int x, auto* to) {
      const int64_t right = v.cs * v.element_bytes(), below = v.row() * v.element_bytes();
      uint8_t* const first = v.element(image, v.at(y, x));
      for (int i = 0; i < outputs_; ++i)
        for (int j = 0; j < outputs_; ++j) to[i * outputs_ + j] = first + i * below + j * right;
    };
    const int64_t first = first_of(index);
    int64_t image = first / per_image_;
    int y = first % per_image_ / across_ * outputs_, x = first % across_ * outputs_;
    for (int t = 0; t < group.count; ++t) {
      const int at = t * outputs_ * outputs_;
      square(out, image, y, x, group.to.out + at);
      if (y + outputs_ > out.h || x + outputs_ > out.w)  // beyond an edge
        for (int i = 0; i < outputs_ * outputs_; ++i)
          if (y + i / outputs_ >= out.h || x + i % outputs_ >= out.w) group.to.out[at + i] = nullptr;
      if (t_.residual) square(*t_.residual, image, y, x, group.to.residual + at);
      if ((x += outputs_) >= out.w) x = 0, y += outputs_;
      if (y >= out.h) y = 0, ++image;
    }
  }

  // One vector of channels of a group.
  void multiply(Group& group, int vector, const uint8_t* v) const {
    const Panels& panels = *t_.step.winograd;
    const int first_channel = vector * t_.isa.lanes;
    const uint8_t* const weights = panels.bytes.data() + vector * panels.block_bytes;
    const WinogradTile tile = {v, (const int32_t*)(v + positions_bytes_), group.count * tile_bytes_, tile_bytes_, group.count, panels.groups,
                               weights, vector + 1 < vectors_ ? weights + panels.block_bytes : weights, panels.init.data() + first_channel};
    group.to.first_channel = first_channel;
    const float unit = side_ == 4 ? 0.25f : side_ == 5 ? 0.5f : 1.0f;
    t_.isa.winograd(side_, tile, t_.step.epilogue_from(first_channel, unit), group.to, std::min(t_.isa.lanes, t_.node.n - first_channel));
  }

  const Task& t_;
  const int side_, outputs_;          // of a tile
  const int64_t tile_bytes_;          // of one position
  const int threads_, vectors_;
  int across_, per_image_;            // tiles of a row and of an image
  int64_t tiles_, groups_, largest_;  // in all; how many groups; the tiles of the largest
  int64_t positions_bytes_, bytes_;   // of the largest group's transformed input, and with the starts that follow it
  bool by_tiles_;
};

}  // namespace

void run_winograd(const Task& task) { Convolution(task).run(); }

}  // namespace ternary
