// The step plan: which worker takes which piece of which tensor. Plain C++; a plan is one block of memory without
// inner pointers, so that it can be copied to a device as it is.
#pragma once

#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>

#include "groups.h"

namespace bregman {

constexpr int kMaxSlots = 4;

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, fp16 = 3 };

struct TensorRecord {
  void* param;
  void* state[kMaxSlots];
  const uint64_t* mask;  // one bit per element in memory order, or null
  int64_t numel;
  GroupLayout layout;
  double weight;  // of each group
  int64_t first_number;  // where its numbers begin among those of the plan (`PlanView::numbers`)
  int64_t strip_rows;    // of each strip but the last, if it is visited in strips, or 0
  // By r2, and for strided groups by r1 and by the columns of most tiles and of a slab's last.
  Divider by_row, by_inner, by_columns[2];
};

BREGMAN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BREGMAN_HD int64_t strips_of(const TensorRecord& record) { return ceil_div(record.layout.rows(), record.strip_rows); }

// The groups of tensors [first_tensor, end_tensor) share k.
struct Budget {
  int64_t k;
  int32_t first_tensor, end_tensor;
};

// What a step with budgets writes of each tensor: the decay of its groups, and how far their shares have risen
// (math/envelope.h).
struct Sharing {
  double decay, eta;
};

// Separable: `count` elements from `begin`. Grouped: `count` neighbouring groups from group `begin`, all of one (g0, g1);
// or a strip, `count` whole rows from row `begin` of a tensor whose groups all run through all of its rows. Strips come
// last in a plan.
struct Item {
  int64_t begin;
  int32_t count;
  int32_t tensor;
};

struct PlanHeader {
  int64_t bytes;
  int32_t rule, dtype, slots, grouped;
  int64_t tensors, items, strips;  // items that are strips
  int64_t elements;           // of all tensors
  int64_t scratch_elements;   // the largest tile, or panel of one that cannot be held at once
  int64_t tile_groups;        // the most groups of a tile
  int64_t tile_capacity;      // elements that a worker can hold at once
  int64_t panel;              // elements that it takes at a time of a tile with more
  int64_t budgets, group_sums;
  int64_t record_offset, item_offset, budget_offset, shape_offset;
  int64_t written_offset;  // of what steps with budgets or strips write: each tensor's sharing, its numbers
};

// How finely to cut; the numbers are each driver's own.
struct Tuning {
  int64_t chunk;         // elements per separable item, a multiple of 64
  int64_t tile;          // elements that a tile of contiguous groups should hold
  int64_t strided_tile;  // the same for groups scattered in memory
  int64_t min_segment;   // contiguous elements below which a strided tile is not cut, unless it can be held only then
  int64_t least_segment; // and below which not even then
  int64_t max_groups;    // per tile
  int64_t align;         // elements: rows of a tile are a multiple of them, so that they end where vectors or lines do
  int64_t capacity;      // elements that fit on chip
  int64_t panel;         // elements to take at a time of a tile that does not; no more than `capacity`
  int64_t workers;       // that run side by side: such tiles are as wide as leaves work for all
  int64_t strip_rows;    // what no tile holds is visited in strips of at least so many rows,
  int64_t strip_columns; // where these are no longer than this
};

struct TensorSpec {
  void* param;
  std::vector<void*> state;
  const void* mask;
  std::vector<int64_t> sizes, strides;
  int64_t group_dims;  // bits, or -1 for separable
  double weight;
  int64_t budget = 0;  // the k that its groups share; -1: they share the tensor's before; 0: they share none
};

struct PlanView {
  const char* base;
  BREGMAN_HD const PlanHeader& header() const { return *reinterpret_cast<const PlanHeader*>(base); }
  BREGMAN_HD const TensorRecord* records() const { return reinterpret_cast<const TensorRecord*>(base + header().record_offset); }
  BREGMAN_HD const Item* items() const { return reinterpret_cast<const Item*>(base + header().item_offset); }
  BREGMAN_HD const Budget* budgets() const { return reinterpret_cast<const Budget*>(base + header().budget_offset); }
  // Of a plan in memory that its step may write.
  BREGMAN_HD Sharing* sharing() const {
    return reinterpret_cast<Sharing*>(const_cast<char*>(base) + header().written_offset);
  }
  // In strips: the sums of each column of each strip.
  BREGMAN_HD double* numbers(const TensorRecord& record) const {
    return reinterpret_cast<double*>(sharing() + header().tensors) + record.first_number;
  }
  // Behind them, with a budget or in strips: the sums of each group, the first of all groups and then the second; or its
  // factor.
  BREGMAN_HD double* group_numbers(const TensorRecord& record) const {
    const int64_t strips = record.strip_rows ? strips_of(record) : 0;
    return numbers(record) + strips * record.layout.g2 * record.layout.r2 * header().group_sums;
  }
  // Behind these, with a budget: how each group's share of it rises (math/envelope.h), which is found between the visits.
  BREGMAN_HD double* group_slopes(const TensorRecord& record) const {
    return group_numbers(record) + record.layout.groups() * header().group_sums;
  }
  // Per tensor: offset of its entry, which holds ndim, sizes and strides.
  BREGMAN_HD const int64_t* shape(int64_t tensor) const {
    const int64_t* table = reinterpret_cast<const int64_t*>(base + header().shape_offset);
    return table + table[tensor];
  }
};

// Groups per tile: enough to fill it and to read whole memory lines, never more than there are. `share` are the elements
// of a plan for one worker.
inline int64_t groups_per_tile(const GroupLayout& layout, const Tuning& tuning, int64_t share) {
  const int64_t size = layout.group_size(), unit = tuning.align / std::gcd(tuning.align, layout.r2);
  auto rounded = [&](int64_t count) { return count > unit ? count - count % unit : count; };
  int64_t count = std::min(tuning.tile, tuning.capacity) / size;
  if (layout.rows() > 1) {
    const int64_t lines = ceil_div(ceil_div(tuning.min_segment, layout.r2), unit) * unit;
    count = std::max(tuning.strided_tile / size, lines);
    if (count * size > tuning.capacity) {
      const int64_t held = rounded(tuning.capacity / size);
      const int64_t least = ceil_div(ceil_div(tuning.least_segment, layout.r2), unit) * unit;
      // What cannot be held at once still has to fit row by row; two lines at a time pay, where nobody waits for it.
      count = held * layout.r2 >= tuning.least_segment
                  ? held
                  : std::min(std::clamp(share / size, least, std::max(least, 2 * lines)), rounded(tuning.panel / layout.r2));
    }
  }
  return std::min(rounded(std::clamp<int64_t>(count, 1, tuning.max_groups)), layout.g2);
}

// Rows of a strip, or 0: strips are for tensors that are one slab of groups, too large for a tile. As large as a tile, if
// that leaves enough rows for the sums of their columns to be few.
inline int64_t rows_per_strip(const GroupLayout& layout, const Tuning& tuning) {
  const int64_t rows = layout.rows(), columns = layout.g2 * layout.r2;
  if (rows == 1 || layout.g0 * layout.g1 > 1 || columns > tuning.strip_columns) return 0;
  const int64_t count = std::max(tuning.strip_rows, ceil_div(tuning.strided_tile, columns));
  return rows * columns > tuning.strided_tile && count < rows ? count : 0;
}

inline void cut(const TensorSpec& spec, TensorRecord& record, int32_t index, const Tuning& tuning, PlanHeader& header,
                int64_t share, std::vector<Item>& items, std::vector<Item>& strips) {
  if (record.numel == 0) return;
  if (spec.group_dims < 0) {
    for (int64_t begin = 0; begin < record.numel; begin += tuning.chunk)
      items.push_back({begin, int32_t(std::min(tuning.chunk, record.numel - begin)), index});
    return;
  }
  const GroupLayout& layout = record.layout;
  const int64_t step = groups_per_tile(layout, tuning, share), rest = layout.g2 % step;
  if (record.strip_rows) {
    record.by_columns[0] = Divider::by(step * layout.r2);  // of tiles, for penalties that do without strips
    for (int64_t row = 0; row < layout.rows(); row += record.strip_rows)
      strips.push_back({row, int32_t(std::min(record.strip_rows, layout.rows() - row)), index});
    return;
  }
  for (int64_t count : {step, rest}) {  // a slab's last tile may be held where others are not
    const int64_t size = count * layout.group_size();
    header.scratch_elements = std::max(header.scratch_elements, size <= tuning.capacity ? size : tuning.panel);
  }
  header.tile_groups = std::max(header.tile_groups, step);
  if (step > 1) record.by_row = Divider::by(layout.r2);
  if (layout.rows() > 1) {
    record.by_row = Divider::by(layout.r2);
    record.by_inner = Divider::by(layout.r1);
    record.by_columns[0] = Divider::by(step * layout.r2);
    record.by_columns[1] = Divider::by(std::max<int64_t>(1, rest) * layout.r2);
  }
  for (int64_t slab = 0; slab < layout.g0 * layout.g1; ++slab)
    for (int64_t g2 = 0; g2 < layout.g2; g2 += step)
      items.push_back({slab * layout.g2 + g2, int32_t(std::min(step, layout.g2 - g2)), index});
}

// Throws std::invalid_argument where kernels cannot serve a tensor.
inline std::vector<char> make_plan(const std::vector<TensorSpec>& specs, int rule, DType dtype, int slots,
                                   const Tuning& tuning, int group_sums = 1) {
  PlanHeader header{};
  std::vector<TensorRecord> records;
  std::vector<Item> items, strips;
  std::vector<Budget> budgets;
  int64_t numbers = 0;
  std::vector<int64_t> shapes(specs.size());
  header.grouped = !specs.empty() && specs[0].group_dims >= 0;
  for (const TensorSpec& spec : specs)
    header.elements += std::accumulate(spec.sizes.begin(), spec.sizes.end(), int64_t(1), std::multiplies<>());
  const int64_t share = header.elements / tuning.workers;
  for (size_t i = 0; i < specs.size(); ++i) {
    const TensorSpec& spec = specs[i];
    TensorRecord record{};
    record.param = spec.param;
    for (size_t k = 0; k < spec.state.size(); ++k) record.state[k] = spec.state[k];
    record.mask = static_cast<const uint64_t*>(spec.mask);
    record.weight = spec.weight;
    record.numel = 1;
    for (int64_t size : spec.sizes) record.numel *= size;
    std::string why = why_not_dense(spec.sizes, spec.strides);
    if (why.empty() && record.numel && spec.group_dims >= 0)
      why = collapse(spec.sizes, spec.strides, spec.group_dims, record.layout);
    const GroupLayout& layout = record.layout;
    if (why.empty() && layout.rows() > 1 && std::max(layout.rows(), layout.r2) > INT32_MAX / 2)
      why = "a group's rows do not fit 31-bit indices";
    if (!why.empty()) throw std::invalid_argument("tensor " + std::to_string(i) + ": " + why);
    if ((spec.group_dims >= 0) != bool(header.grouped)) throw std::invalid_argument("a plan is separable or grouped");
    if (spec.budget) {
      if (spec.group_dims < 0 || (spec.budget < 0 && budgets.empty()))
        throw std::invalid_argument("tensor " + std::to_string(i) + ": it has no groups, or no budget, to share");
      if (spec.budget > 0) budgets.push_back({spec.budget, int32_t(i), int32_t(i)});
      budgets.back().end_tensor = int32_t(i + 1);
    }
    if (record.numel && spec.group_dims >= 0) record.strip_rows = rows_per_strip(layout, tuning);
    record.first_number = numbers;
    if (record.strip_rows) numbers += strips_of(record) * layout.g2 * layout.r2 * group_sums;
    if ((record.strip_rows || spec.budget) && record.numel) numbers += layout.groups() * (group_sums + (spec.budget != 0));
    if (!spec.budget != !specs[0].budget) throw std::invalid_argument("all tensors share budgets, or none");
    cut(spec, record, int32_t(i), tuning, header, share, items, strips);
    records.push_back(record);
    shapes[i] = int64_t(shapes.size());
    shapes.push_back(int64_t(spec.sizes.size()));
    shapes.insert(shapes.end(), spec.sizes.begin(), spec.sizes.end());
    shapes.insert(shapes.end(), spec.strides.begin(), spec.strides.end());
  }
  items.insert(items.end(), strips.begin(), strips.end());
  header.rule = rule;
  header.dtype = int32_t(dtype);
  header.slots = slots;
  header.tensors = int64_t(records.size());
  header.items = int64_t(items.size());
  header.strips = int64_t(strips.size());
  header.budgets = int64_t(budgets.size());
  header.group_sums = group_sums;
  header.tile_capacity = tuning.capacity;
  header.panel = tuning.panel;
  header.record_offset = sizeof(PlanHeader);
  header.item_offset = header.record_offset + int64_t(records.size() * sizeof(TensorRecord));
  header.budget_offset = header.item_offset + int64_t(items.size() * sizeof(Item));
  header.shape_offset = header.budget_offset + int64_t(budgets.size() * sizeof(Budget));
  header.written_offset = header.shape_offset + int64_t(shapes.size() * sizeof(int64_t));
  header.bytes = header.written_offset;
  if (numbers || !budgets.empty())
    header.bytes += header.tensors * int64_t(sizeof(Sharing)) + numbers * int64_t(sizeof(double));
  std::vector<char> plan(size_t(header.bytes));
  std::memcpy(plan.data(), &header, sizeof(header));
  if (!records.empty())
    std::memcpy(&plan[size_t(header.record_offset)], records.data(), records.size() * sizeof(TensorRecord));
  if (!items.empty()) std::memcpy(&plan[size_t(header.item_offset)], items.data(), items.size() * sizeof(Item));
  if (!budgets.empty())
    std::memcpy(&plan[size_t(header.budget_offset)], budgets.data(), budgets.size() * sizeof(Budget));
  if (!shapes.empty())
    std::memcpy(&plan[size_t(header.shape_offset)], shapes.data(), shapes.size() * sizeof(int64_t));
  return plan;
}

}  // namespace bregman
